"""The main job end to end: a gateway and embedded engines as processes, real HTTP traffic, a comparison."""
