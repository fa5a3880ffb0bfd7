"""What the live page adds to the explorer's front: markup, style and scripts."""
