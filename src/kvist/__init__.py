"""kvist: the cache-and-load brain for fleets of LLM servers.

A policy is written once and runs in three places: the simulator, the gateway and the engines.
"""

__version__ = "0.1.0"
