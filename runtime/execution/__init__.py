"""One run of a program: sessions, bindings, memory, states, collectives, threads."""
