//! How a service is declared: a trait to implement, a server over it, a client.
//!
//! Invariant: a method that is not declared is answered `Unimplemented`. Never opens a
//! connection: a server is a tower service for whoever has one, a client calls one.

use std::pin::Pin;

use tonic::Status;
use tonic::codegen::tokio_stream::Stream;

/// Messages that come one after another.
pub type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What a method answers, for the declaration of a service.
macro_rules! answer {
    (unary $response:ty) => { $response };
    (stream $response:ty) => { $crate::service::Streamed<$response> };
}
pub(crate) use answer;

/// Declares a service: `unary` or `stream` (of answers), its name on the wire, its name here.
macro_rules! service {
    (
        $(#[$doc:meta])*
        $service:ident, $server:ident, $client:ident, $path:literal {
            $( $(#[$method_doc:meta])* $arity:ident $wire:ident $method:ident($request:ty) -> $response:ty; )*
        }
    ) => {
        $(#[$doc])*
        #[tonic::async_trait]
        pub trait $service: Send + Sync + 'static {
            $(
                $(#[$method_doc])*
                async fn $method(
                    &self,
                    request: $request,
                ) -> Result<$crate::service::answer!($arity $response), tonic::Status>;
            )*
        }

        #[doc = concat!("Answers requests for [`", stringify!($service), "`].")]
        #[derive(Debug)]
        pub struct $server<T>(std::sync::Arc<T>);

        impl<T> $server<T> {
            /// Every method with its path, in the order of the definition.
            pub const METHODS: &'static [&'static str] = &[$( stringify!($wire) ),*];

            /// Answers with `inner`.
            pub fn new(inner: std::sync::Arc<T>) -> Self {
                Self(inner)
            }
        }

        impl<T> Clone for $server<T> {
            fn clone(&self) -> Self {
                Self(std::sync::Arc::clone(&self.0))
            }
        }

        impl<T, B> tonic::codegen::Service<tonic::codegen::http::Request<B>> for $server<T>
        where
            T: $service,
            B: tonic::codegen::Body + Send + 'static,
            B::Error: Into<tonic::codegen::StdError> + Send + 'static,
        {
            type Response = tonic::codegen::http::Response<tonic::body::Body>;
            type Error = std::convert::Infallible;
            type Future = tonic::codegen::BoxFuture<Self::Response, Self::Error>;

            fn poll_ready(
                &mut self,
                _: &mut std::task::Context<'_>,
            ) -> std::task::Poll<Result<(), Self::Error>> {
                std::task::Poll::Ready(Ok(()))
            }

            fn call(&mut self, request: tonic::codegen::http::Request<B>) -> Self::Future {
                let inner = std::sync::Arc::clone(&self.0);
                Box::pin(async move {
                    match request.uri().path() {
                        $(
                            concat!("/", $path, "/", stringify!($wire)) => {
                                struct Method<T>(std::sync::Arc<T>);
                                $crate::service::method!($arity Method, $service, $method, $request, $response);
                                let codec = $crate::message::Codec::<$response, $request>::default();
                                let mut grpc = tonic::server::Grpc::new(codec)
                                    .max_decoding_message_size($crate::MESSAGE_BYTES_MAX);
                                Ok($crate::service::call!($arity grpc, Method(inner), request))
                            }
                        )*
                        _ => Ok(tonic::Status::unimplemented("no such method here").into_http()),
                    }
                })
            }
        }

        #[doc = concat!("Calls a [`", stringify!($service), "`].")]
        #[derive(Debug, Clone)]
        pub struct $client<C>(C);

        impl<C> $client<C>
        where
            C: tonic::client::GrpcService<tonic::body::Body> + Clone,
            C::Error: Into<tonic::codegen::StdError>,
            C::ResponseBody: tonic::codegen::Body<Data = tonic::codegen::Bytes> + Send + 'static,
            <C::ResponseBody as tonic::codegen::Body>::Error: Into<tonic::codegen::StdError> + Send,
        {
            /// Calls through `connection`.
            pub fn new(connection: C) -> Self {
                Self(connection)
            }

            $(
                $(#[$method_doc])*
                pub async fn $method(
                    &self,
                    request: $request,
                ) -> Result<$crate::service::answer!($arity $response), tonic::Status> {
                    let mut grpc = tonic::client::Grpc::new(self.0.clone())
                        .max_decoding_message_size($crate::MESSAGE_BYTES_MAX);
                    grpc.ready()
                        .await
                        .map_err(|error| tonic::Status::unavailable(error.into().to_string()))?;
                    let path = tonic::codegen::http::uri::PathAndQuery::from_static(
                        concat!("/", $path, "/", stringify!($wire)),
                    );
                    let codec = $crate::message::Codec::<$request, $response>::default();
                    let request = tonic::Request::new(request);
                    $crate::service::ask!($arity grpc, request, path, codec)
                }
            )*
        }
    };
}
pub(crate) use service;

/// Makes one method something that tonic can call.
macro_rules! method {
    (unary $name:ident, $service:ident, $method:ident, $request:ty, $response:ty) => {
        impl<T: $service> tonic::server::UnaryService<$request> for $name<T> {
            type Response = $response;
            type Future = tonic::codegen::BoxFuture<tonic::Response<$response>, tonic::Status>;

            fn call(&mut self, request: tonic::Request<$request>) -> Self::Future {
                let inner = std::sync::Arc::clone(&self.0);
                Box::pin(async move {
                    let answer = inner.$method(request.into_inner()).await?;
                    Ok(tonic::Response::new(answer))
                })
            }
        }
    };
    (stream $name:ident, $service:ident, $method:ident, $request:ty, $response:ty) => {
        impl<T: $service> tonic::server::ServerStreamingService<$request> for $name<T> {
            type Response = $response;
            type ResponseStream = $crate::service::Streamed<$response>;
            type Future =
                tonic::codegen::BoxFuture<tonic::Response<Self::ResponseStream>, tonic::Status>;

            fn call(&mut self, request: tonic::Request<$request>) -> Self::Future {
                let inner = std::sync::Arc::clone(&self.0);
                Box::pin(async move {
                    let answer = inner.$method(request.into_inner()).await?;
                    Ok(tonic::Response::new(answer))
                })
            }
        }
    };
}
pub(crate) use method;

/// Lets tonic answer a request.
macro_rules! call {
    (unary $grpc:ident, $method:expr, $request:ident) => {
        $grpc.unary($method, $request).await
    };
    (stream $grpc:ident, $method:expr, $request:ident) => {
        $grpc.server_streaming($method, $request).await
    };
}
pub(crate) use call;

/// Lets tonic ask.
macro_rules! ask {
    (unary $grpc:ident, $request:ident, $path:ident, $codec:ident) => {
        Ok($grpc.unary($request, $path, $codec).await?.into_inner())
    };
    (stream $grpc:ident, $request:ident, $path:ident, $codec:ident) => {{
        let answer = $grpc.server_streaming($request, $path, $codec).await?;
        Ok(Box::pin(answer.into_inner()) as $crate::service::Streamed<_>)
    }};
}
pub(crate) use ask;
