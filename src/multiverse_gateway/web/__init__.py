"""HTTP over ASGI: the middleware around the API and the pages, and the ASGI door of inference."""
