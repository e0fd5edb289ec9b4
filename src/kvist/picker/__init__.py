"""The endpoint picker: routing policies behind Envoy, over its external-processing protocol."""
