"""The live router: OpenAI traffic in, one of the fleet's workers out."""
