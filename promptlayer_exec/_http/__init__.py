"""The only package that sends requests and opens WebSockets: aiohttp, connections and their rate.

Only `_session` imports it, and gives the engine one function of it: `Transport.send`.
"""
