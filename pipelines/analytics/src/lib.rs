//! The output log as tables, and SQL over them.
