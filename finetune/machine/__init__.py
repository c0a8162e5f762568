"""The machine that we run on, seen from inside: hardware, billed time, price, and the notice that it is taken away."""
