"""What does a file hold, and which model is it?"""
