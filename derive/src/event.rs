//! `#[derive(Event)]`: derives the list of types, the type of a value, and the upcasters from one attribute per
//! variant.

use std::collections::HashMap;

use proc_macro2::{Span, TokenStream};
use quote::quote;
use syn::{Attribute, Data, DeriveInput, Error, Fields, Ident, LitInt, LitStr, Path, Token, meta::ParseNestedMeta};

/// One event type, as stated by its attribute.
struct Type<'a> {
    /// `None` for a struct, which has one type.
    variant: Option<&'a Ident>,
    fields: &'a Fields,
    id: u16,
    name: String,
    version: u16,
    /// The older schema versions, each with the method of reading it.
    older: Vec<(u16, Reading)>,
}

/// The method of reading an older schema version.
enum Reading {
    /// From the variant of the same name in this enum, or from this struct, field by field.
    Same(Path),
    /// By this function.
    Upcast(Path),
}

pub(crate) fn expand(input: &DeriveInput) -> syn::Result<TokenStream> {
    if let Some(parameter) = input.generics.params.first() {
        return Err(Error::new_spanned(parameter, "`Event` cannot be derived for a generic type"));
    }
    let types = match &input.data {
        Data::Enum(data) if data.variants.is_empty() => {
            return Err(Error::new_spanned(&input.ident, "an event type needs a variant"));
        }
        Data::Enum(data) => data
            .variants
            .iter()
            .map(|variant| one_type(Some(&variant.ident), &variant.fields, &variant.attrs, variant.ident.span()))
            .collect::<syn::Result<Vec<_>>>()?,
        Data::Struct(data) => vec![one_type(None, &data.fields, &input.attrs, input.ident.span())?],
        Data::Union(data) => return Err(Error::new_spanned(data.union_token, "`Event` cannot be derived for a union")),
    };
    check_unique(&types, input.ident.span())?;
    let methods = methods(input)?;
    let name = &input.ident;
    let declared = types
        .iter()
        .map(|Type { id, name, version, .. }| quote!(::corelane::event::EventType::new(#id, #name, #version)));
    let upcasters = types.iter().flat_map(|event_type| upcasters(name, event_type));
    let ids = types.iter().map(|Type { variant, id, .. }| match variant {
        Some(variant) => quote!(#name::#variant { .. } => #id,),
        None => quote!(#name { .. } => #id,),
    });
    Ok(quote! {
        #[automatically_derived]
        impl ::corelane::event::Event for #name {
            const TYPES: &'static [::corelane::event::EventType] = &[#(#declared),*];
            const UPCASTERS: &'static [::corelane::event::Upcaster<Self>] = &[#(#upcasters),*];

            #[inline]
            fn event_type(&self) -> ::corelane::event::EventTypeId {
                ::corelane::event::EventTypeId(match self {
                    #(#ids)*
                })
            }

            #methods
        }
    })
}

/// Reads the attribute of one variant, or of a struct.
fn one_type<'a>(
    variant: Option<&'a Ident>,
    fields: &'a Fields,
    attributes: &[Attribute],
    span: Span,
) -> syn::Result<Type<'a>> {
    let (mut id, mut name, mut version, mut older) = (None, None, 1, Vec::new());
    for attribute in attributes.iter().filter(|attribute| attribute.path().is_ident("event")) {
        attribute.parse_nested_meta(|meta| {
            if meta.path.is_ident("id") {
                let literal: LitInt = meta.value()?.parse()?;
                id = Some(literal.base10_parse::<u16>()?);
                if id == Some(0) {
                    return Err(Error::new_spanned(literal, "id 0 is reserved: ids begin at 1"));
                }
            } else if meta.path.is_ident("name") {
                name = Some(meta.value()?.parse::<LitStr>()?.value());
            } else if meta.path.is_ident("version") {
                version = meta.value()?.parse::<LitInt>()?.base10_parse()?;
            } else if meta.path.is_ident("same") {
                let (version, path) = older_version(&meta)?;
                older.push((version, Reading::Same(path)));
            } else if meta.path.is_ident("upcast") {
                let (version, path) = older_version(&meta)?;
                older.push((version, Reading::Upcast(path)));
            } else if variant.is_none() && is_method(&meta.path) {
                meta.value()?.parse::<Path>()?;
            } else {
                return Err(meta.error("unknown option: use id, name, version, same or upcast"));
            }
            Ok(())
        })?;
    }
    let missing = |option| {
        Error::new(span, format!("state the event type: #[event(id = 1, name = \"...\")]; `{option}` is missing"))
    };
    let (id, name) = (id.ok_or_else(|| missing("id"))?, name.ok_or_else(|| missing("name"))?);
    let mut versions = std::collections::HashSet::new();
    for (old, _) in &older {
        if *old >= version {
            return Err(Error::new(span, format!("version {old} is not older than the current one, {version}")));
        }
        if !versions.insert(*old) {
            return Err(Error::new(span, format!("version {old} is read in two ways")));
        }
    }
    Ok(Type { variant, fields, id, name, version, older })
}

/// Parses the `(1 = path)` of `same` and `upcast`.
fn older_version(meta: &ParseNestedMeta<'_>) -> syn::Result<(u16, Path)> {
    let content;
    syn::parenthesized!(content in meta.input);
    let version = content.parse::<LitInt>()?.base10_parse()?;
    content.parse::<Token![=]>()?;
    Ok((version, content.parse()?))
}

fn check_unique(types: &[Type<'_>], span: Span) -> syn::Result<()> {
    let (mut ids, mut names) = (HashMap::new(), HashMap::new());
    for event_type in types {
        let at = event_type.variant.map_or(span, Ident::span);
        let shown = || event_type.variant.map_or_else(String::new, ToString::to_string);
        if let Some(other) = ids.insert(event_type.id, shown()) {
            return Err(Error::new(at, format!("event type id {} is also that of `{other}`", event_type.id)));
        }
        if let Some(other) = names.insert(&event_type.name, shown()) {
            return Err(Error::new(at, format!("the name \"{}\" is also that of `{other}`", event_type.name)));
        }
    }
    Ok(())
}

/// Returns the upcasters of one event type.
fn upcasters(event: &Ident, event_type: &Type<'_>) -> Vec<TokenStream> {
    let Type { variant, fields, id, older, .. } = event_type;
    let one = |(version, reading): &(u16, Reading)| {
        let old = match reading {
            Reading::Upcast(path) => return quote!(::corelane::event::Upcaster::new(#id, #version, #path)),
            Reading::Same(old) => old,
        };
        let (bindings, values): (Vec<_>, Vec<_>) = fields
            .members()
            .enumerate()
            .map(|(at, member)| {
                let binding = quote::format_ident!("field_{at}");
                (quote!(#member: #binding), quote!(#member: #binding))
            })
            .unzip();
        let (from, into, other) = match variant {
            Some(variant) => (
                quote!(#old::#variant),
                quote!(#event::#variant),
                quote! {
                    #[allow(unreachable_patterns, reason = "an enum with one variant has no other")]
                    _ => ::core::result::Result::Err(::corelane::event::Upcaster::<#event>::another_variant()),
                },
            ),
            None => (quote!(#old), quote!(#event), quote!()),
        };
        quote! {
            ::corelane::event::Upcaster::new(#id, #version, |archive| match <#old as ::corelane::state::Stored>::decode(archive)? {
                #from { #(#bindings),* } => ::core::result::Result::Ok(#into { #(#values),* }),
                #other
            })
        }
    };
    older.iter().map(one).collect()
}

fn is_method(path: &Path) -> bool {
    path.is_ident("time") || path.is_ident("correlation")
}

/// Returns the methods `time` and `correlation`, if the type's own attribute names functions for them.
fn methods(input: &DeriveInput) -> syn::Result<TokenStream> {
    let (mut time, mut correlation) = (None, None);
    let is_struct = matches!(input.data, Data::Struct(_));
    for attribute in input.attrs.iter().filter(|attribute| attribute.path().is_ident("event")) {
        attribute.parse_nested_meta(|meta| {
            if meta.path.is_ident("time") {
                time = Some(meta.value()?.parse::<Path>()?);
            } else if meta.path.is_ident("correlation") {
                correlation = Some(meta.value()?.parse::<Path>()?);
            } else if !is_struct {
                return Err(
                    meta.error("unknown option: an enum has time and correlation; its variants state the types")
                );
            } else if meta.input.peek(Token![=]) {
                meta.value()?.parse::<syn::Lit>()?;
            } else {
                older_version(&meta)?;
            }
            Ok(())
        })?;
    }
    let time = time.map(|path| {
        quote! {
            fn time(&self) -> ::core::option::Option<::corelane::event::Time> {
                #path(self)
            }
        }
    });
    let correlation = correlation.map(|path| {
        quote! {
            fn correlation(&self) -> ::corelane::event::Correlation {
                #path(self)
            }
        }
    });
    Ok(quote!(#time #correlation))
}
