"""The HTTP server: an OpenAI-compatible face of one model, on FastAPI and uvicorn (the extra `serve`)."""
