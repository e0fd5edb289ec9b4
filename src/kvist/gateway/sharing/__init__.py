"""What several gateways tell each other, so that each knows the load that the others put on a worker.

Every gateway publishes its own share: what it has under way on each worker. A reader adds the newest fresh
share of each other gateway to its own figures. Nothing is counted twice, no order or repetition of messages
matters, and a gateway that is not heard of any more fades out: without the exchange each learns alone.

Which prefixes a worker holds is not exchanged: the worker's KV events tell every gateway that itself.
"""
