"""The HTTP server: endpoints, streams of text and chat templates that clients of the OpenAI API know."""
