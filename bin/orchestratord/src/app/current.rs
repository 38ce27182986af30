//! A value that can be replaced while requests run.

use std::sync::{Arc, PoisonError, RwLock};

/// What is in force now. Whoever takes it keeps what they took; who comes
/// later gets what was set in the meantime.
#[derive(Debug)]
// Held to copy a pointer only, never across an await.
pub struct Current<T>(RwLock<Arc<T>>);

impl<T> Current<T> {
    pub fn new(value: T) -> Self {
        Self(RwLock::new(Arc::new(value)))
    }

    pub fn get(&self) -> Arc<T> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// For the value's one owner: two that set it would lose one's change.
    pub fn set(&self, value: T) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(value);
    }
}
