"""What every measurement rests on: the form of a case and of a result, clocks, memory, errors, ceilings, targets."""
