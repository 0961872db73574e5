"""An open session in plain asyncio, without HTTP: watches, calls and starts."""
