"""Images for training and evaluation: ``build.build_data(config.data).loader("train", batch_size=...)``."""
