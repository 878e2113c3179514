//! Tables and SQL: started by `forebay sql`, `forebay sink` and `forebay report`.
fn main() {}
