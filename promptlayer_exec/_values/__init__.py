"""What a caller holds in the hand: frozen results, errors, events and policies, and their texts.

Every other package may import it, and it imports none of them, except `_structuring` at first use.
"""
