"""Do gates use high frequencies better than activations do?"""
