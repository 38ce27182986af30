//! The plan under a simulated clock, and the actor with pools that only say
//! what they do.

mod choice;
mod doubles;
mod line;
mod simulation;
