"""The HTTP server: endpoints of the OpenAI API, text streams and chat templates."""
