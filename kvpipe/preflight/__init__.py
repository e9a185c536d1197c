"""What the whole grid will cost, by a rehearsal of a few batches. (The doctor asks whether it can run.)"""
