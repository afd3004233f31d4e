"""Cost of annealed training beside plain training and its rivals, of packed layers, and of the Hessian traces."""
