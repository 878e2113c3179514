//! What the crate promises, over whole files.

#![cfg(test)]

mod any;
mod cases;
mod shipped;
mod support;
mod wrong;
