"""By what a student is trained: DDP, FSDP2 and DeepSpeed, behind one protocol."""
