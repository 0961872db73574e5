"""An open session in plain asyncio: watches, calls and starts. It knows no HTTP."""
