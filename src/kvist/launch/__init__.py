"""`kvist launch`: real engines and a gateway in front, as processes that are watched and stopped together."""
