"""Banks whose rows lie on several shards: one question to all of them, and answers that merge exactly.

Who the shards are is a matter of the transport (ranks of ``torch.distributed``, workers of Ray, or parts of one
process); what is asked and how answers merge is written once.
"""
