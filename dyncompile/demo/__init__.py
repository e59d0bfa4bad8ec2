"""The main job, end to end: a static model in, a really skipping one out."""
