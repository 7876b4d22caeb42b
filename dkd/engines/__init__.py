"""What a student is trained by: DDP, FSDP2 and DeepSpeed, with the one interface `Engine`.

The only room that knows Accelerate and DeepSpeed. Everything that differs between engines is in here: `rules.py` holds
what is known of them before anything starts, `base.py` what training asks of them.
"""
