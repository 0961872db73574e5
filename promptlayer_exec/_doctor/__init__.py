"""`promptlayer-exec doctor`: does a server, and a setup, do what this package expects of them?

Everything here is judged by what came over the wire, since a session tolerates much of it silently.
"""
