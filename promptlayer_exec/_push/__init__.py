"""Wake-ups: the channels on which completions are pushed, and the polls that do not trust them."""
