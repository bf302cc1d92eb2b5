"""The figures of the paper's frequency analysis on ImageNet."""
