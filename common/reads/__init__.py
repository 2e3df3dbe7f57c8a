"""From the files of sequencers and trainers to the read store. No method needs to be read together with it."""
