"""How the network is told where a token stands."""
