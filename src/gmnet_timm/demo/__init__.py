"""A short training on photographs that an installed package carries: does everything work here, and can it learn?"""
