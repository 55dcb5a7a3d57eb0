"""The HTTP side of `serve`: OpenAI's endpoints over `inference.service`."""
