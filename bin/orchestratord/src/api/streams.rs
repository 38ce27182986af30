//! How many event streams one client may hold open. An answer that a client waits
//! for in the same request counts as one.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::HeaderName;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use llama_orch_types::ErrorCode;

use super::error::ApiError;
use crate::app::config::Limits;
use crate::app::server::{Holding, Peer};
use crate::services::event_log::Failure;

/// Headers of an answer that is an event stream.
pub const EVENT_STREAM: [(HeaderName, &str); 3] = [
    (CONTENT_TYPE, "text/event-stream"),
    (CACHE_CONTROL, "no-cache"),
    // Asks proxies that know it not to hold tokens back.
    (HeaderName::from_static("x-accel-buffering"), "no"),
];

/// When a client with too many streams shall come back.
const COME_BACK: Duration = Duration::from_secs(1);

/// The open streams of every client. A client is the address it comes from: the
/// token is the same for all.
#[derive(Debug)]
pub struct StreamCounts {
    limits: Limits,
    // Held for a look-up and an addition only, never across an await.
    open: Mutex<HashMap<IpAddr, u64>>,
}

impl StreamCounts {
    pub fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            open: Mutex::default(),
        })
    }

    /// Room for one more, given back on drop; `None` if there is none.
    fn take(self: &Arc<Self>, client: IpAddr) -> Option<OpenStream> {
        let mut open = self.lock();
        let count = open.entry(client).or_default();
        if *count >= self.limits.streams_for(client) {
            return None;
        }
        *count += 1;
        Some(OpenStream {
            counts: Arc::clone(self),
            client,
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, u64>> {
        // Nothing in between panics, so the counts are whole.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug)]
struct OpenStream {
    counts: Arc<StreamCounts>,
    client: IpAddr,
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        let mut open = self.counts.lock();
        if let Some(count) = open.get_mut(&self.client) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.client);
            }
        }
    }
}

/// Layer of the routes that stream or wait for an answer. The count goes down when the answer's body
/// is dropped, whoever drops it.
pub async fn bounded(
    State(counts): State<Arc<StreamCounts>>,
    request: Request,
    next: Next,
) -> Response {
    let peer = request.extensions().get::<Peer>();
    let client = peer.map_or(Ipv4Addr::UNSPECIFIED.into(), |peer| peer.0);
    let Some(open) = counts.take(client) else {
        return too_many(counts.limits.streams_for(client)).into_response();
    };
    let answer = next.run(request).await;
    answer.map(|body| Body::new(Holding::new(body, open)))
}

fn too_many(at_most: u64) -> ApiError {
    let mut failure = Failure::new(
        ErrorCode::AdmissionReject,
        format!(
            "this client's address has {at_most} answers or event streams open, as many as it may"
        ),
    )
    .retry_after(COME_BACK)
    .with_hint("close some, or raise `limits.streams_per_client`");
    failure.policy_label = Some("streams_per_client".to_owned());
    failure.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_client_has_its_own_count_and_none_is_kept_for_nothing() {
        let counts = StreamCounts::new(Limits {
            streams_per_client: Some(2),
            ..Limits::default()
        });
        let (one, other): (IpAddr, IpAddr) =
            (Ipv4Addr::LOCALHOST.into(), Ipv4Addr::BROADCAST.into());
        let first = counts.take(one).unwrap();
        let second = counts.take(one).unwrap();
        assert!(counts.take(one).is_none());
        let others = counts.take(other).unwrap();
        drop(first);
        assert!(counts.take(one).is_some());
        drop((second, others));
        assert!(counts.lock().is_empty());
    }
}
