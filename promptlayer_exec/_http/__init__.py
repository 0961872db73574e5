"""The only package that makes requests: aiohttp, its connections, and the rate of requests."""
