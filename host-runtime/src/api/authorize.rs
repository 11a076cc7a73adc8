//! The role check of the API and of the portal. A handler takes an [`Authorized`], which only the
//! check creates: a handler that is registered without a policy does not compile.
//!
//! ```text
//!  request ─► caller (401) ─► input (400, 413, 415) ─► role (403) ─► handler ─► object (404)
//!                               │                        ▲
//!                               └─► policy: which call? ─┘
//! ```

use std::future::Future;
use std::sync::Arc;

use axum::extract::{FromRequest, FromRequestParts, Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodFilter, MethodRouter, on};

use super::Api;
use super::error::ApiError;
use super::identity::Caller;
use super::policy::{Call, may};

/// A caller who has the role for a call. Whether the caller may make it for a certain device or
/// server is checked when the handler looks up that object.
pub(super) struct Authorized {
    pub(super) api: Arc<Api>,
    caller: Caller,
    call: Call,
}

impl Authorized {
    /// Checks that the caller has the role for this call.
    ///
    /// # Errors
    /// 403 if the caller does not have it.
    pub(super) fn new(api: &Arc<Api>, caller: Caller, call: Call) -> Result<Self, ApiError> {
        ApiError::unless(may(&caller, call), ApiError::forbidden)?;
        Ok(Self { api: api.clone(), caller, call })
    }

    pub(super) const fn caller(&self) -> &Caller {
        &self.caller
    }

    pub(super) const fn call(&self) -> Call {
        self.call
    }
}

/// Calls by the name of their case, for example an action in the body.
pub(super) type Cases = &'static [(&'static str, Call)];

/// Call that the requests to a route make. The call determines the role that a caller needs.
pub(super) enum Policy<I> {
    /// Every request makes the same call.
    Always(Call),
    /// The call depends on the input of type `I`.
    ByCase {
        /// All cases. An input that names another one is rejected with 400.
        cases: Cases,
        /// Returns the name of the input's case.
        case: fn(&I) -> Result<&str, ApiError>,
    },
}

impl<I> Clone for Policy<I> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<I> Copy for Policy<I> {}

impl<I> Policy<I> {
    /// All calls, with the names of their cases; the name is empty if there is only one call.
    pub(super) fn calls(&self) -> Vec<(&'static str, Call)> {
        match self {
            Self::Always(call) => vec![("", *call)],
            Self::ByCase { cases, .. } => cases.to_vec(),
        }
    }

    fn call(&self, input: &I) -> Result<Call, ApiError> {
        match self {
            Self::Always(call) => Ok(*call),
            Self::ByCase { cases, case } => {
                let name = case(input)?;
                let found = cases.iter().find(|(known, _)| *known == name);
                let unknown = || ApiError::bad_request(format!("Unknown action: {name}."));
                found.map(|(_, call)| *call).ok_or_else(unknown)
            }
        }
    }
}

/// Handler of authorized requests, with an input of type `I`.
pub(super) trait Handler<I>: Clone + Send + Sync + 'static {
    fn handle(self, auth: Authorized, input: I) -> impl Future<Output = Response> + Send;
}

impl<I, H, F, R> Handler<I> for H
where
    H: Fn(Authorized, I) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = R> + Send,
    R: IntoResponse,
{
    fn handle(self, auth: Authorized, input: I) -> impl Future<Output = Response> + Send {
        let response = self(auth, input);
        async { response.await.into_response() }
    }
}

/// Serves a method with a handler, for callers who have the role that the policy requires. `P`
/// identifies the caller of a request.
pub(super) fn guard<P, I, M>(
    method: MethodFilter,
    policy: Policy<I>,
    handler: impl Handler<I>,
) -> MethodRouter<Arc<Api>>
where
    P: FromRequestParts<Arc<Api>> + Into<Caller>,
    I: FromRequest<Arc<Api>, M> + Send + 'static,
{
    let serve = move |State(api): State<Arc<Api>>, request: Request| {
        let handler = handler.clone();
        async move {
            match authorize::<P, I, M>(&api, policy, request).await {
                Ok((auth, input)) => handler.handle(auth, input).await,
                Err(refusal) => refusal,
            }
        }
    };
    on(method, serve)
}

async fn authorize<P, I, M>(
    api: &Arc<Api>,
    policy: Policy<I>,
    request: Request,
) -> Result<(Authorized, I), Response>
where
    P: FromRequestParts<Arc<Api>> + Into<Caller>,
    I: FromRequest<Arc<Api>, M>,
{
    let (mut parts, body) = request.into_parts();
    let caller = P::from_request_parts(&mut parts, api).await;
    let caller: Caller = caller.map_err(IntoResponse::into_response)?.into();
    let request = Request::from_parts(parts, body);
    let input = I::from_request(request, api).await.map_err(IntoResponse::into_response)?;
    let auth = policy.call(&input).and_then(|call| Authorized::new(api, caller, call));
    Ok((auth.map_err(IntoResponse::into_response)?, input))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_input_determines_the_call() {
        let always: Policy<String> = Policy::Always(Call::Look);
        assert_eq!(always.call(&"whatever".to_owned()), Ok(Call::Look));
        let by_case: Policy<String> = Policy::ByCase {
            cases: &[("attach", Call::Attach), ("give", Call::ChangeOwner)],
            case: |input| Ok(input),
        };
        assert_eq!(by_case.call(&"give".to_owned()), Ok(Call::ChangeOwner));
        let unknown = by_case.call(&"take".to_owned()).unwrap_err();
        assert_eq!(
            (unknown.status.as_u16(), unknown.message.as_str()),
            (400, "Unknown action: take.")
        );
    }
}
