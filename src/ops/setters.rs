//! Setters that can be chained, for structs that may gain fields.

/// Writes a setter for each named field of a struct, inside an `impl` of it. A setter takes the struct and returns it; one of an
/// `optional` field takes the value that is wrapped in `Some`.
macro_rules! setters {
    ($(optional { $($option:ident: $option_type:ty,)* })? $(plain { $($name:ident: $type:ty,)* })?) => {
        $($(
            #[doc = concat!("Sets [`", stringify!($option), "`](field@Self::", stringify!($option), ").")]
            #[must_use]
            pub fn $option(mut self, $option: $option_type) -> Self {
                self.$option = Some($option);
                self
            }
        )*)?
        $($(
            #[doc = concat!("Sets [`", stringify!($name), "`](field@Self::", stringify!($name), ").")]
            #[must_use]
            pub fn $name(mut self, $name: $type) -> Self {
                self.$name = $name;
                self
            }
        )*)?
    };
}
pub(crate) use setters;
