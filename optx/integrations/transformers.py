"""The Trainer of transformers, and TRL's trainers, which are made of it."""
