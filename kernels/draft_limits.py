"""How far drafts and words reach: what kernels, policies and the core in C++ agree on."""

# The most tokens of a draft that one call verifies.
MAX_DRAFT = 15
# So far a guide's next word may reach, and an end of its text is seen (the authors' released client).
LOOKAHEAD = 16
# The most tokens that one call writes: a word of the guide may begin after the last token of the draft.
WIDTH = MAX_DRAFT + LOOKAHEAD
