"""Push: the channels on which PromptLayer announces completions, and polls in case it fails to.

Only `_session` imports it, and connects it to the engine when a session opens.
"""
