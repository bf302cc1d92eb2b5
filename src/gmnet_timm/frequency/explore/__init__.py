"""What does a model see at each frequency? A page in the browser to move the radius and watch."""
