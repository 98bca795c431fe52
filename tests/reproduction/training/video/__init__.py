"""How testbed-qwen-video was trained: `python -m tests.reproduction.training.video.train`."""
