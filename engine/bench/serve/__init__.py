"""`engineroom bench serve`: what clients of an OpenAI-compatible server wait for, under load."""
