"""`vl2 bench`: how fast a bundle answers, how much memory it takes, and how much of the machine's bandwidth it uses."""
