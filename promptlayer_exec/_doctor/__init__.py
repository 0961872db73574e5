"""`promptlayer-exec doctor`: does a server, and a setup, do what this package expects of them?

The checks judge what came over the wire, since a session tolerates much of it silently. Only `cli`
imports it, and it may look into every layer, because it compares a server with what they expect.
"""
