"""Push: the channels on which PromptLayer announces completions, and polls in case it fails to."""
