"""What goes to the Hugging Face Hub, and is what is there what was meant?"""
