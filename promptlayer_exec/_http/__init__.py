"""The only package that sends requests: aiohttp, its connections, and their rate."""
